"""Networks of other libraries, and a network of your own, distilled with fgm.py."""
