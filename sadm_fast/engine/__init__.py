"""Two DeepSpeed engines, and the one legal way to step them against each other.

The rules (each was measured; breaking one gives silently wrong gradients at some ZeRO stage):
- A player's own step goes through its engine, with ONE engine forward a backward.
- The other player is called through `.module`, frozen, and unfrozen in a `finally`.
- Nothing that is to be trained is frozen before `deepspeed.initialize`: ZeRO drops parameters that need no gradient.
- One summed loss a backward: a second backward before the step would replace the first one's gradients.
- `gradient_clipping` is always given: DeepSpeed's default clips at 1.0.

docs/deepspeed.md has the other ways that were tried.
"""
