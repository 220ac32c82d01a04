"""How good are generated images? Frechet distances to real ones, in several feature spaces."""
