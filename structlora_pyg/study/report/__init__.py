"""From stored runs to tables, figures and pages.

`records` reads runs as data frames and packs them, `grids` joins them with the tables that they belong to, `summary`
averages and compares, `tables` and `figures` show it, `report` writes all of it through `page`; `look` shows one run.
"""
