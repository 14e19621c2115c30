"""Calls to OpenAI-compatible servers, for judges and for policies that are served elsewhere."""
