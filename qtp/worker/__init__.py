"""One rank at work: a plan in, a result out."""
