"""Word lists of the lexical teacher: which words say nothing of a topic, and what may follow a word of each class."""

from __future__ import annotations

DETERMINERS = frozenset("a an the this that these those my your his her its our their every each no some any".split())
PREPOSITIONS = frozenset(
    "of in on at by for with from into onto over under about after before between through during against among around "
    "behind beside beneath below above across along toward towards upon within without near like than per via".split()
)
CONJUNCTIONS = frozenset("and or but nor yet so".split())
SUBORDINATORS = frozenset(
    "if because although though while when whenever whereas unless until since as once that which who whom whose where "
    "why how whether what".split()
)
PRONOUNS = frozenset("i you he she it we they thou ye there who".split())
OBJECTS = frozenset("me him them us thee myself yourself himself herself itself themselves ourselves".split())
AUXILIARIES = frozenset(
    "am is are was were be been being have has had do does did will would shall should can could may might must "
    "isn't aren't wasn't weren't haven't hasn't hadn't don't doesn't didn't won't wouldn't shouldn't can't couldn't "
    "cannot i'm you're he's she's it's we're they're i've you've we've they've i'll you'll he'll she'll we'll they'll "
    "i'd you'd he'd she'd we'd they'd that's there's hath doth art wilt shalt".split()
)
NEGATIONS = frozenset("not never n't".split())
DEGREES = frozenset("very so too more most less least quite rather really almost just only even still also".split())

# What a class of last word calls for.
FOLLOWERS: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"to"}), "the word to", "a verb or the goal of a movement"),
    (frozenset({"a", "an"}), "an indefinite article", "an adjective or a singular noun"),
    (frozenset({"the"}), "the definite article", "an adjective or a noun"),
    (DETERMINERS, "a determiner", "a noun, perhaps with an adjective before it"),
    (PREPOSITIONS, "a preposition", "a noun phrase or a name"),
    (NEGATIONS, "a negation", "a verb, an adjective or an adverb"),
    (CONJUNCTIONS, "a conjunction", "another item or clause like the one before"),
    (SUBORDINATORS, "a word that opens a clause", "the subject or the verb of that clause"),
    (AUXILIARIES, "an auxiliary verb", "a participle, a verb, an adjective or a complement"),
    (PRONOUNS, "a subject pronoun", "a verb"),
    (OBJECTS, "an object pronoun", "a preposition, a complement or the end of the clause"),
    (DEGREES, "an adverb of degree", "an adjective, an adverb or a verb"),
)

# Frequent words that name no topic, beside the classes above.
COMMON = frozenset(
    """
    one two three four five six seven eight nine ten first second third last next many much few little other others
    another same such own new old good bad great small big large long short high low right left best better well
    time times year years day days week weeks month months today tomorrow yesterday now then here way ways thing things
    people person man men woman women child children life world place part parts case cases point number lot kind
    make makes made making take takes took taken taking get gets got getting give gives gave given giving go goes went
    gone going come comes came coming see sees saw seen seeing look looks looked looking know knows knew known knowing
    think thinks thought want wants wanted need needs needed use uses used using find finds found say says said saying
    tell tells told ask asks asked keep keeps kept let lets put puts set seem seems seemed feel feels felt become
    becomes became leave left try tries tried call calls called work works worked working help helps helped show shows
    showed shown start started begin began turn turned mean means meant hear heard bring brought happen happened hold
    held write wrote read run believe sure able available different important possible every everyone everything
    someone something anyone anything nothing nobody none all both either neither back down out off up again away ever
    always often sometimes usually maybe perhaps however therefore thus indeed instead already together enough really
    actually please yes ok okay oh ah hello hi thanks thank etc please http https www com org net html via us let's
    please because please upon unto thy thine shall hath doth sir
    """.split()
)

STOP = (
    DETERMINERS
    | PREPOSITIONS
    | CONJUNCTIONS
    | SUBORDINATORS
    | PRONOUNS
    | OBJECTS
    | AUXILIARIES
    | NEGATIONS
    | DEGREES
    | COMMON
) | {"to"}

# A dozen frequent words of each tell languages in Latin script apart; English needs none.
LANGUAGES: dict[str, frozenset[str]] = {
    "German": frozenset("der die das und ist nicht ein eine ich mit zu auf sich den dem von auch wird für".split()),
    "French": frozenset("le la les et est une des du dans pour que qui pas sur avec ce il elle au nous vous".split()),
    "Spanish": frozenset("el los las y es una del en por que con para su como más pero se al lo".split()),
    "Italian": frozenset("il lo gli e è una della di che per con non sono si nel più anche come".split()),
    "Portuguese": frozenset("o os as e é uma da do em que para com não se por mais dos na no um".split()),
    "Dutch": frozenset("de het een en van is niet ik dat op te zijn met voor aan er maar om ook".split()),
}

PAST = frozenset(
    "was were had did said went came saw took made got knew thought told found gave felt left became".split()
)
PRESENT = frozenset(
    "is are has does am says goes comes sees takes makes gets knows thinks tells finds gives feels".split()
)
FUTURE = frozenset("will shall won't i'll we'll you'll he'll she'll they'll it'll".split())
FIRST = frozenset("i me my mine we us our ours myself i'm i've i'll i'd we're we've".split())
SECOND = frozenset("you your yours yourself thou thee thy you're you've you'll".split())
THIRD = frozenset("he she they him her them his hers their theirs himself herself themselves".split())
ARCHAIC = frozenset("thou thee thy thine hath doth art wilt shalt ye tis 'tis o'er ere hither whence wherefore".split())
CASUAL = frozenset("lol yeah gonna wanna gotta kinda hey guys cool awesome stuff btw omg haha dude okay ok".split())
IMPERATIVES = frozenset(
    "click add use make take see check visit try remember consider note let do don't please read write go get give "
    "put set open select choose enter type press follow send find ask stop start keep come tell call contact bake mix "
    "stir heat place cut pour install run".split()
)
