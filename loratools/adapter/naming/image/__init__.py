"""Names of the modules of image models, in every spelling in use, and the tables that lead from one to another."""
