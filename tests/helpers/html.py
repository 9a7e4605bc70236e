"""Reading pages."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collect elements and check that tags are closed in the order they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def contrast(page, selector: str) -> float:
    """Return the contrast of a text with what is behind it, after WCAG."""
    return page.evaluate(
        """selector => {
            const light = color => {
                const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const element = [...document.querySelectorAll(selector)].find(e => e.checkVisibility());
            let behind = element;
            const seen = e => !/, 0\\)$|transparent/.test(getComputedStyle(e).backgroundColor);
            while (behind !== document.body && !seen(behind)) behind = behind.parentElement;
            const style = getComputedStyle(element);
            const front = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
            const pair = [light(front), light(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
            return (pair[0] + 0.05) / (pair[1] + 0.05);
        }""",
        selector,
    )
