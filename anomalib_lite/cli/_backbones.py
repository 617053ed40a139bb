"""The command backbones: list the networks with a short name, and where their weights are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalib_lite.networks import Network

_HEAD = ("name", "M", "stride", "D", "image size", "GFLOPs", "speed", "weights", "network")
_TEXTS = (0, 6, 7, 8)  # columns that are aligned to the left


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "backbones",
        help="list the networks with a short name",
        description="List the networks with a short name: their parameters (M, millions), the "
        "stride of each layer in pixels, the numbers per patch (D), the advised image size, the "
        "computed GFLOPs of one such image with their class of speed (fast: below 2, medium: 30, "
        "slow: 200), where the weights are, and timm's name. With names, describe these networks.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks to describe")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or the descriptions."""
    from anomalib_lite.networks import NETWORKS, whereabouts

    where = arguments.command
    if arguments.names:
        from anomalib_lite._validation import check_choice

        for name in arguments.names:
            check_choice("NAME", name, NETWORKS, where)
    weights = {name: whereabouts(name, where) for name in arguments.names or NETWORKS}
    if arguments.names:
        print("\n\n".join(_description(name, NETWORKS[name], weights[name]) for name in weights))
    else:
        rows = [_row(name, network, weights[name]) for name, network in NETWORKS.items()]
        print(_table([_HEAD, *rows]))
        print("\nEvery name of timm works as well: fit --backbone convnext_tiny")


def _row(name: str, network: Network, weights: str) -> tuple[str, ...]:
    figures = (
        f"{network.millions:.1f}",
        _strides(network),
        str(network.n_features),
        str(network.image_size),
        f"{network.gflops:.3g}",
    )
    return (name, *figures, network.speed, weights, network.timm)


def _table(rows: list[tuple[str, ...]]) -> str:
    """Align columns: texts to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [c.ljust(w) if i in _TEXTS else c.rjust(w) for i, (c, w) in enumerate(cells)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _strides(network: Network) -> str:
    return ", ".join(map(str, dict.fromkeys(network.strides)))


def _description(name: str, network: Network, weights: str) -> str:
    mean, std = ([round(value, 3) for value in values] for values in network.pixels)
    side = network.image_size
    facts = {
        "network": f"{network.timm} of timm, {network.millions:.1f} million parameters",
        "trained on": f"{network.trained_on}, at {network.trained_at}x{network.trained_at}",
        "licence": f"{network.licence}, as timm states it",
        "weights": f"{weights}; hub: {network.repository}",
        "layers": f"{', '.join(network.layers)}: {network.n_features} numbers per patch",
        "stride": f"{_strides(network)} pixels",
        "image size": f"{side} is advised; multiples of {max(network.strides)}",
        "pixels": f"mean {mean}, standard deviation {std}",
        "speed": f"{network.speed}: {network.gflops:.3g} GFLOPs for {side}x{side} (computed)",
    }
    return "\n".join([name, *(f"  {fact:<12}{text}" for fact, text in facts.items())])
