"""The run of one rank: objective, optimizer, schedule, loop, checkpoints, metrics.

`session.build(...).fit()` trains; `loop.train` is the loop; `loading.load_model` reads a trained model back.
"""
