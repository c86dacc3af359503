"""What the asymmetric loss is, written slowly and obviously, so that the fast code can be held against it.

* ``reference.float64``: NumPy in float64, value and analytic gradient. This is the truth.
* ``reference.autodiff``: what a user would write in jnp today, with gradients by autodiff.
* ``reference.closed_form``: what a careful user would write in jnp, value and gradient by hand, float32.
  It is the yardstick: a kernel's error may be at most 1.5 times this one's, plus 1e-6.

Nothing here is imported by the library, and nothing here imports the library: a mistake that both shared
would pass every comparison between them.
"""
