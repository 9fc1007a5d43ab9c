"""One experiment's report: the page, the model card and README beside the tables, and the facts they state."""
