"""One option more for pytest: how long the soak test runs."""


def pytest_addoption(parser):
    parser.addoption("--soak-minutes", type=float, default=0.05, help="for -k soak (default: 3 seconds)")
