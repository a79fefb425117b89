"""How a property test draws its cases: as many as it is told, the same every time unless a seed is given."""

from hypothesis import HealthCheck, Phase, given, seed, settings


def run(request, strategy, cases: int, function) -> None:
    """function(case) for each of as many cases, and smaller ones where it raises."""
    number = request.config.getoption("--hypothesis-seed")

    @settings(
        max_examples=cases,
        derandomize=number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def property_holds(case):
        function(case)

    if number is not None:
        property_holds = seed(int(number) if number.isdecimal() else number)(property_holds)
    property_holds()
