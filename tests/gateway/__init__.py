"""Tests of the gateway part."""
