"""A run over many hosts that is watched, stopped as a whole, and continued with what is left.

`hosts` says who takes part, `agent` runs on each of them, `link` talks to it over ssh, `attempt` is
one launch with its end, `loop` goes from one to the next. Nothing here imports torch.
"""
