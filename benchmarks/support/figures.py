# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""How each peer looks in every figure: Okabe and Ito's colours, which colour-blind people tell apart, and a marker."""

from support import numpyro_peers, peers

STYLES = {
    peers.OURS: ("#0072B2", "o", "-"),
    peers.COMPILED: ("#0072B2", "s", "--"),
    peers.RECORDED: ("#56B4E9", "s", "--"),
    peers.SVI_STEP: ("#0072B2", "D", ":"),
    peers.SVI_RUN: ("#56B4E9", "v", ":"),
    peers.RENYI: ("#D55E00", "o", "-"),
    peers.TRACE: ("#E69F00", "^", "-"),
    peers.EAGER: ("#000000", "o", "-"),
    peers.DISTRIBUTIONS: ("#666666", "x", "-"),
    peers.BY_COMPILER: ("#000000", "s", "--"),
    numpyro_peers.UPDATE: ("#009E73", "s", "--"),
    numpyro_peers.SCAN: ("#009E73", "v", ":"),
    numpyro_peers.GRADIENT: ("#009E73", "o", "--"),
}


def style(name):
    color, marker, line = STYLES[name]
    return {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "label": name}
