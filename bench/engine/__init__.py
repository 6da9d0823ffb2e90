"""The real SGLang engine with and without pystage: time to the first token, request by request.

``plans``       models and workloads                     ``experiment``  both engines, in turn
``worker``      the process that owns an engine          ``inside``      what runs in its scheduler
``tables``      quantiles, intervals, targets, the table
"""
