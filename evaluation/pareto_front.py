"""The Pareto front of quality against cost."""


def pareto_front(costs: list[float], qualities: list[float]) -> list[int]:
    """The points than which none of lower or equal cost is better, in the order of their cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], -qualities[index])):
        if not front or qualities[index] > qualities[front[-1]]:
            front.append(index)
    return front
