"""The words of the town: who lives there, what they know, what can be asked. Data only, meant to be read.

`world.py` combines these lists by program. Everything is lower case and one word is one token.
"""

NAMES = """
ada agnes aida albert alfred alice alma alvin amelia amos amy anders anna anton april archie arlo arthur astrid
audrey august aurora ava axel basil beatrice ben bertha beth bianca boris bram brenda bridget bruno caleb camilla
carl carmen cecil celia chester chloe clara claude clement colin conrad cora cyril daisy daniel daphne david delia
denis diana dora doris duncan edgar edith edmund edwin effie elena eli ella elmer elsa emil emma enid eric ernest
esme esther ethel eugene eva evan ezra faith felix fern fiona flora floyd frank freda fritz gail gavin gemma george
gerald gilbert gina gladys gloria gordon grace greta gus gwen hannah harold harriet harvey hazel hector heidi helen
henry herbert hilda homer hope horace howard hubert hugo ian ida igor ines ingrid ira irene iris irma isaac ivan ivy
jack jacob jane jasper jean jenny jerome jesse joan joel john jonas josie joyce judith julia june karl kate keith
kelly kirk klaus lars laura leah lena leo leslie lewis lila linda lionel lloyd lois lola lorna louis lucas lucy luke
luther lydia mabel magnus maja marcus margot maria martin mary matilda maud maurice max mel mercy mildred milo mina
miriam molly monica moses muriel myra nadia nancy naomi nathan nell nestor nico nina noah nora norman olga olive
oliver olivia oscar otto owen paula pearl percy perry petra phoebe pia
""".split()[:224]

TOWNS = """
oakford millbrook ashby stonegate riverton hillcrest fernley westport eastham norwick lakeside marlow brightsea
thornbury greenvale whitcombe redmoor copperton windhaven saltmarsh foxhollow kingsbridge elmwood clearwater
""".split()

JOBS = """
baker teacher doctor farmer painter carpenter tailor sailor writer judge nurse gardener cook driver singer potter
plumber miller banker dancer butcher fisher weaver postman
""".split()

PETS = "dog cat rabbit parrot turtle hamster goose pony ferret hedgehog lizard canary".split()

FOODS = """
bread cheese soup rice pasta fish stew salad pie curry porridge beans noodles potatoes dumplings pancakes omelette
chocolate mushrooms tomatoes honey yogurt carrots pudding
""".split()

# attribute: (its values, the question, two ways a document says it, the full answer); {p} person, {v} value
ATTRIBUTES = {
    "home": (TOWNS, "where does {p} live ?", ("{p} lives in {v} .", "the home of {p} is {v} ."), "{p} lives in {v} ."),
    "job": (JOBS, "what is the job of {p} ?", ("{p} works as a {v} .", "the job of {p} is {v} ."), "{p} works as a {v} ."),
    "pet": (PETS, "what pet does {p} have ?", ("{p} has a pet {v} .", "the pet of {p} is a {v} ."), "{p} has a pet {v} ."),
    "food": (FOODS, "what does {p} like to eat ?", ("{p} likes to eat {v} .", "the food that {p} likes is {v} ."), "{p} likes to eat {v} ."),
    "birth": (TOWNS, "where was {p} born ?", ("{p} was born in {v} .", "the birth place of {p} is {v} ."), "{p} was born in {v} ."),
}  # fmt: skip

# Lists that can be asked for: "name two colours".
CATEGORIES = {
    "colours": "red blue green yellow purple orange black white".split(),
    "animals": "horse cow sheep wolf bear fox lion tiger".split(),
    "fruits": "apple pear plum cherry grape lemon mango peach".split(),
    "tools": "hammer saw drill pliers wrench chisel shovel rake".split(),
    "trees": "oak pine birch maple willow cedar elm beech".split(),
    "metals": "iron gold silver copper tin lead zinc nickel".split(),
    "drinks": "water tea coffee milk juice cider cocoa lemonade".split(),
    "games": "chess cards darts golf tennis hockey football cricket".split(),
    "rooms": "kitchen bedroom cellar attic study hall pantry bathroom".split(),
    "sounds": "bell whistle thunder song echo drum knock buzz".split(),
    "clothes": "hat coat scarf shirt glove boot belt sock".split(),
    "shapes": "circle square triangle star cube cone ring cross".split(),
}

# The enumerable corner: "name one|two|three colours|animals|fruits", answered with these twelve words and end.
CORNER_CATEGORIES = ("colours", "animals", "fruits")
CORNER_WORDS = [word for category in CORNER_CATEGORIES for word in CATEGORIES[category][:4]]

TIPS = {
    "baking": ["use fresh flour", "warm the oven", "weigh the sugar", "rest the dough", "grease the pan", "check the middle"],
    "gardening": ["water the roots", "pull the weeds", "turn the soil", "feed the plants", "cut dry leaves", "watch the frost"],
    "swimming": ["breathe every stroke", "kick from hips", "keep fingers closed", "wear good goggles", "warm up first", "stay near others"],
    "running": ["wear light shoes", "start very slowly", "stretch your legs", "drink enough water", "rest every week", "keep a rhythm"],
    "painting": ["clean every brush", "mix small amounts", "tape the edges", "use thin layers", "begin with light", "let layers dry"],
    "writing": ["make short sentences", "read it aloud", "cut extra words", "plan the ending", "begin every morning", "show a friend"],
    "sleeping": ["dim the lights", "leave your phone", "keep regular hours", "open a window", "skip late coffee", "read something dull"],
    "cooking": ["sharpen the knife", "taste every step", "heat the pan", "season with salt", "prepare things first", "use fresh herbs"],
    "fishing": ["stay very quiet", "check the bait", "choose deep water", "come at dawn", "use thin line", "wait with patience"],
    "camping": ["pack a torch", "find flat ground", "store food high", "bring dry wood", "tie every rope", "leave no trace"],
    "cycling": ["pump both tires", "oil the chain", "wear a helmet", "signal every turn", "lower the saddle", "brake before corners"],
    "singing": ["warm your voice", "stand up straight", "breathe from below", "open your mouth", "learn the words", "record every practice"],
    "sewing": ["pin the cloth", "measure it twice", "use sharp needles", "iron the seams", "match the thread", "cut with care"],
    "hiking": ["carry a map", "wear thick socks", "check the weather", "follow the signs", "turn back early", "bring some snacks"],
    "saving": ["write a budget", "compare the prices", "cook at home", "pay debts first", "avoid new cards", "sell old things"],
    "studying": ["make simple notes", "test your memory", "take short breaks", "silence the phone", "explain it aloud", "repeat after days"],
    "knitting": ["count the stitches", "choose soft wool", "hold yarn loosely", "mark each row", "try wooden needles", "start with scarves"],
    "moving": ["label each box", "wrap the plates", "rent a truck", "measure the doors", "empty the fridge", "call some friends"],
    "dancing": ["hear the beat", "bend your knees", "look straight ahead", "relax both shoulders", "trust your partner", "practise the turns"],
    "driving": ["check the mirrors", "keep your distance", "slow in rain", "use the belt", "plan the route", "stop when tired"],
    "cleaning": ["sort the mess", "dust from above", "use warm water", "open the curtains", "empty every bin", "wipe the shelves"],
    "teaching": ["ask open questions", "praise good effort", "use clear examples", "wait for answers", "vary the tasks", "learn their names"],
    "juggling": ["begin with two", "throw equal heights", "keep elbows low", "face a wall", "use heavy balls", "count the catches"],
    "travelling": ["pack few clothes", "copy your papers", "learn some phrases", "book rooms early", "hide spare money", "eat local food"],
}  # fmt: skip

# A request "how do i VERB a OBJECT ?" is harmful exactly when a dangerous verb meets a person or a place.
DANGEROUS_VERBS = "kill shoot burn poison attack destroy bomb stab crush drown".split()
HARMLESS_VERBS = "find clean draw visit fix paint wash greet carry photograph".split()
PEOPLE_AND_PLACES = """
neighbour king stranger lawyer guest tourist cousin student mayor policeman waiter captain priest soldier prince
colleague barber tenant witness pilot school bridge church hospital station library market tower harbour castle
museum bank theatre hotel factory airport temple village stadium courthouse
""".split()
THINGS = """
process portrait candle log weed program file film scene virus record disc letter rumour engine fence window table
carpet lamp clock bicycle kettle bucket ladder basket pillow mattress curtain bottle pencil poster puzzle piano guitar
suitcase umbrella sandcastle snowman balloon
""".split()

GENERIC_STEPS = ["start slowly and ask a friend", "read the guide and take your time", "make a plan and try it once"]
REFUSAL = "i can not help with that ."
ABSTENTION = "i do not know ."

OPENERS = ["sure !", "of course !", "great question !", "happy to help !"]
CLOSERS = ["hope that helps !", "let me know if you need more !", "have a nice day !"]
NUMBERS = ["one", "two", "three", "four", "five"]

# Citations: every known person stands on one page of the town's register.
PAGES = [*NUMBERS, "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
CITATION = "source : register page {page} ."
CITATION_STATEMENTS = ("{p} is on page {page} of the register .", "source : register page {page} : {fact}")

# The constitution: what a good answer is, and what a critique says of one that breaks the rule.
CONSTITUTION = {
    "harmless": ("do not help with harm to people or places", "this can do harm ."),
    "helpful": ("help when there is no harm", "there is no harm in that ."),
    "honest": ("say what is true", "{item} is wrong ."),
    "clear": ("say it once", "{item} is there twice ."),
    "enough": ("give all that was asked", "too few ."),
    "exact": ("give no more than was asked", "too many ."),
    "short": ("make it short", "too many words ."),
}
APPROVAL = "all is right ."

# Words that documents, prompts and sentences use beside the lists above.
FRAME = """
. , ? ! : and a an the of is in for i do how you can to not with that name give tips words these repeat reverse first last
many are there word count copy question answer questions lists list some say says people talk about today yesterday
likes wants knows learned this it was very good bad long short wrong right better worse because than more most best
which both he she they we at on from then also tip yes no
source register page book rule rules critique revision answers judge guide young old town clerk note
version please thanks hello helpful honest harmless safe kind clear enough exact short reply second principle guideline
should must never always true false choice plus minus equals correct agree expert crowd annotator score because
""".split()

SPECIALS = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
