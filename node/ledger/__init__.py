"""The durable record: what was received, what work is due, who does it, and what happened to each series.

Work that is due is a row, never a message; the broker only notifies. A worker takes a row under a lease that it renews
while it works, and a row whose lease ran out is taken by another. Times are seconds since the epoch, UTC.

`transitions` is the table of states, `tables` are the rows, `record` has the functions that write a state or an event,
`leases` decide who works, `ledger` opens the database and says what is due, `events` words what happened, and `views`
are the read models for people.
"""
