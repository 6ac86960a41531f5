# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""What the costs of a step are asked to be, as ratios; measured by ``steps`` and ``chunks``."""

from support.numpyro_peers import SCAN, UPDATE
from support.peers import BY_COMPILER, COMPILED, DISTRIBUTIONS, EAGER, OURS, RECORDED, RENYI, SVI_RUN, SVI_STEP


def case(problem, particles, work="update", batch=20):
    """``batch`` is of the VAE; an "update" is loss, gradient and Adam, a "gradient" does without Adam."""
    return {"problem": problem, "particles": particles, "work": work, "batch": batch}


SCHOOLS, AUTOENCODER = case("eight schools", 64), case("VAE", 50, "gradient", 100)

# case, peer, of which other peer, at most (None: reported only)
STEPS = [
    (SCHOOLS, SVI_STEP, RENYI, 0.05),
    (SCHOOLS, SVI_STEP, UPDATE, 0.5),
    (SCHOOLS, SVI_RUN, SCAN, None),
    (SCHOOLS, COMPILED, RENYI, 0.2),
    (SCHOOLS, RECORDED, RENYI, None),
    (AUTOENCODER, COMPILED, EAGER, 0.85),
    (AUTOENCODER, COMPILED, BY_COMPILER, 1.1),
    (AUTOENCODER, OURS, EAGER, 1.15),
    (AUTOENCODER, OURS, DISTRIBUTIONS, 1.08),
]
CHUNKS = {"memory": 1.3, "time": 1.5}  # of one chunk alone; of as many steps of one chunk


def title(where):
    work = "loss and gradient" if where["work"] == "gradient" else "loss, gradient and Adam"
    batch = f", batch of {where['batch']}" if where["problem"] == "VAE" else ""
    return f"{where['problem']}, K = {where['particles']:,}{batch} ({work})"


def cells(ratio, asked):
    """Asked, measured and a word, for a table. ``ratio`` is None where nothing was measured."""
    limit = "" if asked is None else f"{asked:g}"
    if ratio is None:
        return [limit, "", "not measured"]
    inside = ""
    if "rounds" in ratio:
        inside = f" ({ratio['rounds']['lower quartile']:.3f} to {ratio['rounds']['upper quartile']:.3f})"
    word = "reported" if asked is None else "holds" if ratio["ratio"] <= asked else "FAILS"
    return [limit, f"{ratio['ratio']:.3f}{inside}", word]
