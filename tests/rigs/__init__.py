"""What tests are made of: fakes, clients, the wire, a browser; each with tests of its own."""
