"""``pytest tests/golden --renew`` stores the images and digests of this machine."""


def pytest_addoption(parser):
    parser.addoption("--renew", action="store_true", help="store what is painted instead of comparing it")
