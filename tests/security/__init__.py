"""Tests of what keeps a service closed: users, TLS, secrets, encryption, times to live."""
