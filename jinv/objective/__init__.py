"""What an attack minimises: priors, weighted terms, ensembles of networks, matched gradients."""

from jinv.objective.terms import Member, Weights

__all__ = ["Member", "Weights"]
