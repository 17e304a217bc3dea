"""Makes profile `smollm` small in every Python that has this folder in PYTHONPATH: a test reaches
into the kernels of notebooks, and into what they start, in this way. Users have no such profile.
"""

from dataclasses import replace

from common import profiles

COUNTS = {
    "pairs": 48,
    "held_out": 24,
    "samples": 2,
    "sampled_prompts": 4,
    "max_new_tokens": 16,
    "seeds": 1,
}

_real = profiles.PROFILES["smollm"]
_recipes = {
    name: replace(recipe, batch_size=4, micro_batch=4) for name, recipe in _real.recipes.items()
}
profiles.PROFILES["smollm"] = replace(_real, recipes=_recipes, **COUNTS)
