"""What an attack minimises: priors, weighted terms, ensembles of networks, matched gradients."""
