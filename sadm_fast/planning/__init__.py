"""The cost of a run before it runs: memory, communication, and a predicted time.

memory and communication count; their numbers are tested against real runs on two CPU ranks. roofline predicts from the
peaks that manufacturers publish (gpus.py). docs/planning.md compares both with the first measurements on a GPU.
"""
