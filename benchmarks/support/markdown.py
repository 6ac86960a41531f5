# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Tables that read well as they are, too."""


def markdown(header, rows):
    """Lines of a Markdown table, columns padded to one width."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def duration(spread):
    """Median and quartiles of seconds, in milliseconds."""
    low, median, high = (1e3 * spread[key] for key in ("lower quartile", "median", "upper quartile"))
    return f"{three(median)} ({three(low)} to {three(high)})"


def three(value):
    """Three digits that count, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"
