"""Pipeline parallelism: schedules are data (actions, generators, validate), one executor runs any of them."""
