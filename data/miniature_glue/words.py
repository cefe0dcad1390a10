"""The words of the miniature GLUE, as data. `a=b` are synonyms, `a/b` are opposites."""

# Occupations by what they are kinds of; a person of a kind is also called by the kind.
ROLES = {
    "musician": "violinist pianist drummer guitarist cellist trumpeter flutist organist",
    "medic": "nurse surgeon doctor=physician dentist paramedic pharmacist midwife",
    "scientist": "chemist biologist physicist astronomer geologist botanist zoologist",
    "craftsman": "carpenter plumber electrician mason blacksmith potter weaver tailor",
    "athlete": "swimmer boxer cyclist goalkeeper sprinter wrestler skier rower",
    "artist": "painter sculptor illustrator engraver muralist cartoonist",
    "official": "minister mayor senator governor ambassador chancellor diplomat",
    "child": "boy=lad girl toddler schoolboy schoolgirl",
    "farmer": "shepherd beekeeper gardener winegrower milkmaid",
    "lawyer": "attorney judge prosecutor solicitor notary",
    "writer": "novelist poet journalist=reporter columnist biographer playwright",
    "officer": "policeman detective sergeant captain inspector sheriff",
    "teacher": "professor lecturer tutor instructor",
    "traveler": "tourist pilgrim explorer hiker commuter",
}

# Things by what they are kinds of, with what people do to them.
THINGS = {
    "fruit": (
        "apple pear peach plum banana mango melon cherry lemon orange fig apricot",
        "eat buy=purchase peel slice wash sell pick steal",
    ),
    "vegetable": (
        "carrot potato onion cabbage pumpkin turnip cucumber radish leek",
        "cook chop buy=purchase wash sell plant peel",
    ),
    "vehicle": (
        "car=automobile truck=lorry bicycle=bike van bus tractor motorcycle taxi=cab ambulance "
        "jeep",
        "drive repair=fix wash park sell paint rent inspect",
    ),
    "instrument": (
        "guitar violin piano flute trumpet drum cello harp clarinet banjo",
        "play tune buy=purchase sell repair=fix carry polish borrow",
    ),
    "document": (
        "letter report contract certificate invoice memo petition passport receipt",
        "write sign print copy translate file destroy mail=post",
    ),
    "animal": (
        "dog=hound cat horse cow sheep goat rabbit=bunny monkey donkey pony camel",
        "feed chase train photograph sell rescue=save wash follow",
    ),
    "bird": (
        "parrot eagle pigeon duck goose owl crow swan falcon heron",
        "feed photograph watch draw=sketch rescue=save release chase",
    ),
    "garment": (
        "coat=jacket shirt dress skirt scarf sweater=pullover hat glove sock uniform",
        "wear wash iron sew mend=repair sell buy=purchase fold",
    ),
    "tool": (
        "hammer saw wrench drill shovel=spade ladder axe chisel screwdriver",
        "use borrow drop buy=purchase lose clean sharpen",
    ),
    "building": (
        "house=home church school hotel library museum factory bridge tower barn",
        "build=construct paint visit inspect design photograph restore",
    ),
    "furniture": (
        "table chair sofa=couch desk bed cupboard bench bookcase stool",
        "build=construct paint buy=purchase move polish sell break",
    ),
    "drink": (
        "coffee tea milk juice beer wine cider lemonade",
        "drink pour spill order serve taste sell",
    ),
    "picture": (
        "photo=photograph painting portrait poster drawing=sketch map mural",
        "admire buy=purchase frame steal describe study hang",
    ),
    "device": (
        "phone=telephone computer camera radio printer television clock lamp fan",
        "repair=fix buy=purchase sell test clean break use",
    ),
}

# Without a synonym or a past like the base form; none of them stands without an object.
STRICT_VERBS = (
    "devour repair avoid contain discover destroy fix mention inspect purchase describe praise"
)

IRREGULAR_VERBS = {
    "eat": "ate eaten",
    "buy": "bought bought",
    "sell": "sold sold",
    "steal": "stole stolen",
    "drive": "drove driven",
    "write": "wrote written",
    "feed": "fed fed",
    "wear": "wore worn",
    "sew": "sewed sewn",
    "build": "built built",
    "drink": "drank drunk",
    "draw": "drew drawn",
    "lose": "lost lost",
    "break": "broke broken",
    "hang": "hung hung",
    "win": "won won",
    "cut": "cut cut",
    "drop": "dropped dropped",
    "chop": "chopped chopped",
    "plan": "planned planned",
}

IRREGULAR_NOUNS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "craftsman": "craftsmen",
    "policeman": "policemen",
    "sheep": "sheep",
    "goose": "geese",
    "potato": "potatoes",
    "photo": "photos",
    "piano": "pianos",
    "cello": "cellos",
    "banjo": "banjos",
    "memo": "memos",
    "radio": "radios",
    "mango": "mangoes",
}

ADJECTIVES = (
    "old/new big=large/small=little heavy/light cheap/expensive=costly clean/dirty=filthy "
    "famous/unknown "
    "beautiful/ugly wonderful/terrible strange/ordinary valuable/worthless"
)
COLOURS = "red blue green yellow white black brown grey purple orange pink golden"
MOODS = (
    "happy/sad young/old rich=wealthy/poor tall/short quiet/loud kind/cruel brave/timid "
    "clever/foolish"
)

# Places by the kind of place they are.
PLACES = {
    "indoors": (
        "in the kitchen|in the hall|in the library|in the cellar|in the office|in the classroom|"
        "in the workshop|"
        "in the bedroom|in the basement|in the museum"
    ),
    "outdoors": (
        "in the garden|in the park|on the beach|in the forest|on the street|in the field|by the "
        "river|"
        "on the mountain|near the lake|in the meadow|on the square"
    ),
}

OUTDOORS = ("vehicle", "animal", "bird", "building")  # kinds of things that are met outdoors only

TIMES = (
    "on Monday|on Tuesday|on Wednesday|on Thursday|on Friday|on Saturday|on Sunday|yesterday|"
    "last week|last night|"
    "this morning|in January|in March|in June|in October|at noon|at midnight|after lunch|before "
    "dinner"
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"

WOMEN = (
    "Anna Maria Susan Helen Laura Emma Julia Sarah Alice Clara Diana Eva Grace Irene Karen "
    "Linda Nancy Olivia Paula "
    "Rachel Sophie Teresa Vera Wendy Martha"
)
MEN = (
    "John Peter David Thomas Robert James Michael Daniel Paul Mark Henry George Frank Walter "
    "Oscar Martin Simon Victor "
    "Samuel Arthur Edward Philip Albert Carl Leon"
)
SURNAMES = (
    "Smith Miller Baker Carter Hughes Morgan Bennett Foster Kelly Porter Reed Sanders Turner "
    "Walsh Young Adams Brooks "
    "Collins Dixon Ellis Fisher Grant Hayes Ingram Jensen Keller Lambert Novak Olsen Palmer"
)
CITIES = (
    "London Paris Berlin Madrid Rome Vienna Prague Dublin Oslo Athens Cairo Tokyo Boston "
    "Chicago Denver Seattle "
    "Toronto Sydney Mumbai Lagos Lima Havana Moscow Warsaw Geneva"
)
COUNTRIES = (
    "France Germany Spain Italy Austria Ireland Norway Greece Egypt Japan Canada Australia "
    "India Peru Poland Sweden "
    "Brazil Mexico Portugal Hungary"
)
COMPANIES = (
    "Intel Siemens Boeing Nestle Toyota Pfizer Oracle Nokia Shell Renault Philips Unilever "
    "Samsung Volvo Cisco Bayer "
    "Fujitsu Danone Airbus Ericsson"
)
TEAMS = (
    "Arsenal Barcelona Chelsea Juventus Liverpool Milan Benfica Ajax Porto Celtic Valencia "
    "Everton Lyon Sevilla"
)
CRIMES = "fraud murder robbery theft bribery arson smuggling kidnapping forgery perjury"
PRODUCTS = (
    "engine=motor vaccine satellite battery chip=processor drug=medicine phone aircraft=plane "
    "tablet turbine"
)
POSITIONS = "chairman director treasurer secretary president spokesman"

NUMBERS = "two three four five six seven eight nine ten eleven twelve"

# Reviews.
GOOD = (
    "brilliant charming delightful moving funny gripping inspired clever witty superb excellent "
    "wonderful graceful "
    "touching fascinating refreshing masterful enjoyable hilarious stunning heartfelt engaging "
    "imaginative elegant "
    "poignant smart warm thrilling beautiful compelling original lively rewarding absorbing "
    "magnificent subtle "
    "captivating splendid tender dazzling remarkable sincere vivid amusing memorable polished "
    "impressive satisfying"
)
BAD = (
    "dull tedious boring clumsy predictable shallow awful terrible stale lifeless pointless "
    "bland pretentious "
    "incoherent sloppy annoying tiresome forgettable dreadful uninspired contrived painful "
    "ridiculous messy hollow "
    "dreary vapid laughable mediocre stupid lazy wooden flat tasteless confused amateurish "
    "cheesy horrible weak "
    "irritating silly unfunny monotonous trite mindless insipid disappointing unbearable"
)
ASPECTS = (
    "story=plot acting script=screenplay dialogue music=score camerawork ending pacing cast "
    "direction humor "
    "opening editing premise soundtrack finale"
)
FILMS = (
    "film=movie comedy drama thriller documentary remake sequel romance western satire musical "
    "fable"
)
VIRTUES = (
    "wit charm depth suspense originality energy grace imagination tension warmth insight heart"
)
VICES = (
    "clichés platitudes gimmicks loopholes stereotypes bombast sentimentality confusion boredom "
    "self-pity"
)
LIKE = "love enjoy admire adore treasure praise recommend"
DISLIKE = "hate dislike regret despise loathe resent detest"
DOUBLED = ("drop", "chop", "plan")  # verbs whose last consonant doubles before -ing

# Topics of headlines: who is in the news, what with, and what they do with it.
TOPICS = {
    "sports": (
        "striker goalkeeper sprinter coach referee boxer swimmer cyclist gymnast rower captain "
        "fencer wrestler umpire",
        "match tournament penalty medal trophy marathon relay playoff stadium racket scoreboard "
        "sprint derby podium hurdle championship",
        "win lose host replay postpone dominate watch celebrate",
    ),
    "science": (
        "physicist biologist astronomer chemist geologist botanist mathematician researcher "
        "zoologist engineer neurologist geneticist meteorologist",
        "experiment telescope theory particle fossil genome comet molecule enzyme microscope "
        "galaxy neuron isotope protein laboratory asteroid",
        "test discover measure confirm simulate study explain observe",
    ),
    "cooking": (
        "chef baker cook butcher waiter brewer grandmother cheesemaker caterer gourmet grocer "
        "confectioner fishmonger dishwasher",
        "soup sauce pancake stew omelette dumpling casserole pie salad curry dessert risotto oven "
        "recipe pudding marinade",
        "bake roast season taste serve stir burn reheat",
    ),
    "travel": (
        "tourist backpacker pilot guide stewardess hiker sailor globetrotter camper commuter "
        "passenger conductor porter pilgrim",
        "flight hotel beach passport cruise island suitcase hostel trail airport itinerary visa "
        "lagoon ferry campsite souvenir",
        "book visit explore cancel recommend photograph miss reach",
    ),
    "money": (
        "banker investor broker accountant lender trader economist auditor treasurer landlord "
        "shareholder creditor taxpayer cashier",
        "loan share bond mortgage dividend currency budget tax pension invoice salary deposit "
        "portfolio insurance subsidy wallet",
        "raise cut sell audit repay refinance save collect",
    ),
}
HEADLINE_ADJECTIVES = (
    "perfect forgotten surprising famous strange favourite first last endless modest enormous "
    "secret popular"
)
