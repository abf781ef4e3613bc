"""How many hosts of a hostfile a run can be split over, and what its ranks there are told."""

from collections.abc import Sequence

from bitscale.config import Config, check_world_size
from bitscale.errors import ConfigError
from bitscale.hostfile import Host


def largest_fit(cfg: Config, hosts: Sequence[Host]) -> list[Host]:
    """The most of `hosts`, from the first on, whose ranks the model and the global batch divide
    over; empty if no number of them does. The batch stays as it is: with fewer ranks each
    accumulates over more micro-batches."""
    for count in range(len(hosts), 0, -1):
        chosen = list(hosts[:count])
        if not why_unfit(cfg, chosen):
            return chosen
    return []


def why_unfit(cfg: Config, hosts: Sequence[Host]) -> str:
    """What keeps `cfg` from running on all of `hosts`; empty if nothing does."""
    try:
        check_world_size(cfg, sum(host.slots for host in hosts))
    except ConfigError as error:
        return str(error)
    return ""


def rank_variables(
    hosts: Sequence[Host], address: str, port: int
) -> dict[str, list[dict[str, str]]]:
    """By host, what each of its ranks finds in its environment: its number, the meeting point."""
    world_size = sum(host.slots for host in hosts)
    variables: dict[str, list[dict[str, str]]] = {}
    first = 0
    for host in hosts:
        variables[host.name] = [
            {
                "RANK": str(first + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(host.slots),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
            for local in range(host.slots)
        ]
        first += host.slots
    return variables
