"""Ranks: their environment, their collectives, and the engines that run a step."""
