"""Pipeline parallelism: schedules are data.

`actions` is what they are made of, `generators` makes them, `validator` proves them, `simulator` times them,
`executor` runs them.
"""
