"""What each kind of matrix is rounded to, and so how large a store becomes: the recipes of a conversion.

    recipe    experts    wq wk wv wo, tok_embeddings, output    router       norms
    q8        q8         q8 group 32                            as it was    f32
    q6, q5    q6, q5     q8 group 32                            as it was    f32
    q4 .. q2  q4 .. q2   q8 group 128                           as it was    f32
    f16       f16        f16                                    as it was    f32
    uniform   any        like the experts                       as it was    f32

One hard fact: a recipe alone fixes every byte's place, so sizes are known before the first weight is read.
"""

from ..config import Config
from ..errors import InputError
from ..formats import PACKED
from .verify import kind_of

QUANTS = ("q8", "q6", "q5", "q4", "q3", "q2", "f16")


def make_recipe(quant: str, uniform: bool = False) -> dict:
    """What each kind of matrix is rounded to: {"name", "experts": [format, group], "matrices": [format, group]}."""
    if quant not in QUANTS:
        raise InputError(f"quant is {quant!r}, expected one of {', '.join(QUANTS)}")
    if quant == "f16":
        return {"name": quant, "experts": ["f16", 0], "matrices": ["f16", 0]}
    experts = [quant, 32 if quant == "q8" else PACKED[quant].group]
    fine = quant in ("q8", "q6", "q5")  # what costs little beside their experts would show beside so small an error
    matrices = experts if uniform else ["q8", 32 if fine else PACKED["q8"].group]
    return {"name": f"uniform {quant}" if uniform else quant, "experts": experts, "matrices": matrices}


def tensor_formats(config: Config, recipe: dict, router_format) -> dict[str, tuple[str, int]]:
    """Our name -> (format, group). router_format(name) -> the format in which the source has a router."""
    out = {}
    for name in config.tensor_shapes():
        kind = kind_of(name)
        if kind == "norms":
            out[name] = ("f32", 0)
        elif kind == "router":
            out[name] = (router_format(name), 0)
        else:
            out[name] = tuple(recipe["experts" if kind == "experts" else "matrices"])
    return out
