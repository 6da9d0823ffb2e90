"""Time to the first token of each request in the real SGLang engine, with and without pystage.

``plans``       models and workloads                     ``experiment``  runs both engines in turn
``worker``      the process that owns an engine          ``inside``      runs in its scheduler
``tables``      quantiles, intervals, targets, the table
"""
