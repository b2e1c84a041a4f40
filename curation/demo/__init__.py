"""A small website of real photos with planted copies, broken files and faces, and the truth about each of them.

``sources`` cuts photos that scikit-image and scikit-learn ship into crops, ``edits`` and ``broken`` make copies and
damaged files of them, ``pages`` links them, ``site`` puts it all into a folder, ``server`` serves that folder,
``truth`` says what every file is, and ``score`` compares what a run made of it with the truth.
"""
