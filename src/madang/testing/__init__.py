"""Fixtures, fakes and conformance suites; part of the package so that plugins can use them."""
