"""Sweeps: many runs from one file, what they share trained once, one table of results.

expression.py, spec.py, expand.py (the file as cells) -> trunks.py (cells as runs) -> store.py,
schedule.py (what is on the disk, what is next) -> local.py, slurm.py, commands.py (back ends,
worker.py runs one) -> results.py (the table) -> verdict.py, figure.py (what it says).
"""
