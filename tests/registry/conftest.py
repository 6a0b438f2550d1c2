from fake_distributions import clean_environment, install

__all__ = ["clean_environment", "install"]
