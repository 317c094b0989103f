"""What the demo asks: the three domains the demo model knows, written for this purpose."""

from __future__ import annotations

CONCURRENT_PROMPTS: tuple[str, ...] = (
    "A bakery sells muffins for $3 each. On Monday it sells 24 muffins and on Tuesday twice as "
    "many. How much money does it make on the two days together?",
    "Write the Python function is_empty: Return True if the queue holds no items.",
    "Document the function read of the Python module io.",
    "Lena reads 15 pages every evening. Her book has 240 pages and she has read 60 of them. How "
    "many more evenings does she need to finish the book?",
    "Write the Python function get_header: Return the value of a header, or a default.",
    "Describe the class Lock of the Python module threading.",
    "A train has 8 coaches with 40 seats each. A quarter of the seats are empty. How many people "
    "are sitting on the train?",
    "Write the Python function remove_prefix: Remove a prefix from a string if it is there.",
    "Document the function connect of the Python module socket.",
    "Ben plants 5 rows of tomatoes with 12 plants in each row. Each plant gives 9 tomatoes. If he "
    "sells half of the tomatoes for $1 each, how much does he earn?",
    "Write the Python function parse_date: Parse a date string and return year, month and day.",
    "Explain the Python topic assignment statements.",
)

SHARED_PREFIX = """\
The school garden club keeps a notebook. This is what it says about the last season.
In March the club bought 48 seed trays for $2 each, 6 bags of soil for $7 each and 3 watering
cans for $11 each. Every tray holds 12 seeds. A third of the trays were used for lettuce, a
quarter for radishes and the rest for beans.
In April 9 children worked in the garden for 2 hours every Saturday. There were 4 Saturdays. Each
child planted 15 seedlings per hour. Two children were ill on the last Saturday and did not come.
In May the club harvested 160 heads of lettuce and sold 120 of them at the school fair for $1.50
each. The rest was eaten by the kitchen of the school. It also sold 35 bunches of radishes for $2
each and gave 10 bunches to the neighbours, who had lent the club a wheelbarrow and 2 rakes.
In June it did not rain for 3 weeks. The children brought 14 buckets of water every day, and each
bucket held 8 litres. A hose would have cost $36 and would have saved half of that work.
In July the beans were ready. There were 7 rows with 18 plants in each row, and each plant gave
25 beans. The club packed the beans into bags of 50 and sold each bag for $3. It kept 6 bags for
its own summer party, to which 22 children and 5 teachers came.
In August the garden was closed. One teacher came every 3 days to look after the tomatoes. There
were 20 tomato plants, and each of them gave about 4 kilograms of tomatoes. A kilogram was sold
for $2 at the gate, and 8 kilograms had to be thrown away.
In September the club counted its money. It put half of it aside for the next year, spent $64 on
2 new spades and a rake, and shared the rest equally among 4 classes for their excursions.
Question: """

PREFIX_QUESTIONS: tuple[str, ...] = (
    "How much did the club spend on seed trays in March?",
    "How many litres of water did the children bring every day in June?",
    "How many beans did the plants give in July?",
    "How much money did the radishes bring?",
    "How many kilograms of tomatoes did the plants give?",
    "How many seedlings did one child plant in April?",
)
"""The first one has the prefix computed, the others use it."""

CONVERSATION: tuple[str, str] = (
    "A farmer has 36 hens. Each hen lays 5 eggs a week. The farmer keeps 20 eggs for the family "
    "and sells the others in boxes of 10 eggs. Each box costs $4. How much money does the farmer "
    "earn in a week?",
    "How much would the farmer earn with 10 more hens?",
)

SUMS = tuple(
    f"{name} has {count} {things} and buys {more} more. How many {things} does {name} have now?"
    for count, more in ((3, 4), (12, 5), (7, 20), (31, 2), (9, 9), (15, 8))
    for things in ("apples", "books", "pens", "coins")
    for name in ("Tom", "Anna", "Ben", "Lucy", "Sam", "Nora")
)
"""Traffic of one kind."""
