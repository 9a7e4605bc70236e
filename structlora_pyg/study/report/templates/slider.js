// Shows the adapter graph at the step that the slider points at.
(() => {
  "use strict";
  const section = document.currentScript.closest("section");
  const { steps, weights, gates, said, look } = JSON.parse(section.querySelector("script[type='application/json']").text);
  const controls = section.querySelector("form.controls");
  const slider = controls.querySelector("input");
  const output = controls.querySelector("output");
  const edges = [...section.querySelectorAll("svg path")];
  const nodes = [...section.querySelectorAll("svg circle.gate")];
  const along = ([low, high], share) => low + (high - low) * share;

  const show = () => {
    const k = Number(slider.value);
    edges.forEach((edge, e) => {
      const weight = weights[k][e];
      edge.setAttribute("visibility", weight > 0 ? "visible" : "hidden");
      edge.setAttribute("stroke-width", along(look.width, weight) * look.thin);
      edge.setAttribute("stroke-opacity", along(look.opacity, weight) * edge.dataset.alpha);
    });
    nodes.forEach((node, n) => node.setAttribute("fill-opacity", along(look.pale, gates[k][n])));
    output.value = said[k];
    slider.setAttribute("aria-valuetext", `step ${steps[k]}`);
  };

  slider.addEventListener("input", show);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  show(); // a browser may bring back where the slider stood before the page was loaded again
})();
