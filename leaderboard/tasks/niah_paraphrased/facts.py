"""Facts about a person, and a question for each that shares no content word with any fact, nor with the filler.

What joins the two is a synonym, a wider term or what everyone knows (the idea of NoLiMa, arXiv 2502.05167). No two
facts answer one question. The table is this project's own; a test compares all words with all others.
"""

FACTS: dict[str, str] = {
    "argues cases before the judge": "Who is a lawyer?",
    "broke the bank by losing everything at roulette": "Who is a gambler?",
    "carries a passport from Brazil": "Who is South American?",
    "climbed Everest without oxygen": "Who is a mountaineer?",
    "cuts diamonds in Antwerp": "Who handles jewels in Belgium?",
    "drank nine cups of espresso": "Who is full of coffee?",
    "drives a Ferrari": "Who has an Italian automobile?",
    "flies a helicopter": "Who is a pilot?",
    "folds cranes out of paper": "Whose hobby is origami?",
    "got married last June": "Who had a wedding?",
    "has a fever and a cough": "Who is ill?",
    "has two daughters and a son": "Who is a parent?",
    "inherited forty million": "Who is wealthy?",
    "knits scarves and sweaters": "Who works with wool?",
    "lives next to the Eiffel Tower": "Who resides in Paris?",
    "milks cows before sunrise": "Who is a farmer?",
    "must not eat any peanuts": "Who has an allergy?",
    "never touches meat or fish": "Whose diet consists of plants?",
    "owns a dachshund": "Who has a hound for a pet?",
    "paints portraits in oil": "Who is an artist?",
    "photographs lions in Kenya": "Who takes pictures of wild animals?",
    "plays the cello": "Who is a musician?",
    "prepares meals at a restaurant": "Who is a chef?",
    "programs robots in Python": "Who is a software developer?",
    "pulls teeth on weekdays": "Who is a dentist?",
    "repairs engines in a garage": "Who is a mechanic?",
    "sails among the Greek islands": "Who knows the Mediterranean?",
    "sees little without glasses": "Who has bad eyes?",
    "sets broken bones at the clinic": "Who is a physician?",
    "shaved off every hair": "Who is bald?",
    "spent a month on the space station": "Who is an astronaut?",
    "swims a mile each dawn": "Who does laps in a pool?",
    "teaches algebra": "Whose subject is mathematics?",
    "trembles when a spider appears": "Who has a phobia?",
    "turned ninety in May": "Who is elderly?",
    "was born in Tokyo": "Who comes from Japan?",
    "wears a crown on state occasions": "Who is a monarch?",
    "writes novels": "Who is an author of books?",
}
"""What is said of a person -> the question in other words."""
