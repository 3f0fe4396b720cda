"""Programs for those who work in the checkout; none of them is part of the installed package.

`fetch_smollm2` brings the small real model, `demo` answers one prompt with it, `ceilings` keeps the code in bounds,
`check_wheel` proves what the built wheel holds, `second_run` runs the tests and tells the unsteady ones.
"""
