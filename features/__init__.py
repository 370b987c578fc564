"""What the state is: the event, the pure step, the packed row, the views.

Everything else in Moveline moves, learns from or answers with what is defined here, and this
package imports none of it.
"""
