"""What measuring commands leave behind, and the commands that read it.

    report.py    a report: rows, tables, and the machine and versions that they were measured with
    files.py     a report's files, written and read again
    plots.py     a report's picture
    compare.py   the command that lists what got slower between two reports
    suite.py     the command that runs all measurements of speed and resources, and writes one page of their reports

A report's name is its command's. Its files are in `bench/results`, or in the folder that `--out` names.
"""
