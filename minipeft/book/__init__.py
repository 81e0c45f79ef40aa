"""The lessons as notebooks and as a book: a static site that is read from disk, without a network.

    lessons.py    the lessons: found, executed in a Jupyter kernel, and kept for as long as nothing that they read changes
    pictures.py   what a figure shows, in words: its alternative text
    links.py      from lessons to the lines of the library and of lessons/experiments, and back; claims
    glossary.txt  the words of the course
    site.py       the pages, written by Sphinx
    ranges.py     the lines at which the README says to start reading

The extra `book` brings what is needed: jupytext reads the lessons, nbclient runs them, MyST-NB and Sphinx write the pages
in the theme Furo, math-core makes MathML of formulas, which browsers show without a script.
"""
