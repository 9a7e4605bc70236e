"""From stored runs to tables, figures and pages.

`records` reads runs and tables as data frames and packs them, `summary` averages and compares, `tables` shows it,
`report` draws it and writes all through `page`; `look` shows one run.
"""
