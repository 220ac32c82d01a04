"""Weights that come from elsewhere and go elsewhere: files of other programs, under this project's names."""
