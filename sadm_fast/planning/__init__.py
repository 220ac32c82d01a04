"""What a run will need and how it will scale, without running it: memory, communication, and a roofline for the time.

memory and communication are counts, tested against real runs on two ranks; roofline is a prediction from the numbers
that manufacturers publish (gpus). Nothing in here was ever timed on a GPU.
"""
