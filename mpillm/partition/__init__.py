"""Divide a model among ranks: stages and shards as pure functions of the model's shape and a rank's place."""
