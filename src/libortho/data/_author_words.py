"""Word lists for the fictional authors, kept apart so that the generator stays readable.

Every phrase carries its own article, so templates never have to choose between 'a' and 'an', and
none needs a pronoun. No phrase of a list is part of another one of the same list; otherwise a
wrong answer could contain the right one. Family names, titles and awards are invented.
"""

from __future__ import annotations


def _phrases(text: str) -> tuple[str, ...]:
    """Split a ';'-separated block into phrases, joining those wrapped over two lines."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


GIVEN_NAMES: dict[str, tuple[str, ...]] = {
    "she": _phrases("""
        Ines; Amara; Katarzyna; Leila; Sunniva; Marisol; Priya; Hanae; Brigid; Odile; Zainab;
        Tamsin; Ludmila; Chiara; Adaeze; Mirela; Soledad; Ottilie; Roxana; Saoirse; Thandiwe;
        Ursula; Vesna; Wanjiru; Xiomara; Yevgenia; Zuzana; Philippa"""),
    "he": _phrases("""
        Anselm; Babak; Cormac; Dmitri; Emeka; Farid; Gaspard; Haruto; Ivo; Kwabena; Lorenzo;
        Matthias; Naveen; Oskar; Pavel; Quentin; Rafael; Stellan; Tariq; Ulrich; Viktor; Wendell;
        Xavier; Yusuf; Zoltan; Eamon; Mateus; Hamish"""),
    "they": _phrases("""
        Ariel; Robin; Sasha; Quinn; Kit; Noor; Akira; Rowan; Jude; Lior; Remy; Indigo; Tal;
        Emery"""),
}

FAMILY_NAMES = _phrases("""
    Okonwele; Vantreuil; Halvarsund; Maretzkov; Tsukimoro; Dellacorva; Brannigolt; Quispara;
    Hanabure; Ferrouane; Lindequell; Zabrowicki; Odhiamba; Kaldervik; Moravane; Szentimrey;
    Rivasol; Bhattavar; Thuyen; Castrellune; Ironsmead; Mbalewa; Vukorevic; Dobrinesti;
    Kirwaneth; Lazarovenka; Nakashimori; Oyelarewa; Pellegrast; Rahmanel; Sorvenko; Tavareno;
    Ulvestrand; Wainscote; Xanthoraki; Yarrowby; Adeyokun; Bergamone; Chandravel; Drummarrow;
    Eskelvik; Iwamizu; Jarnefold; Kovalenti; Lorimund; Mehravani; Novadjian; Ostrivec;
    Penhallorn; Rasmuthen; Saltanian; Teverin; Umbertal; Varkonda; Wolkenau; Yildirhan;
    Zamorell; Achtermolen; Mokwane-Reed; de Luzarde; van Hoekeren; del Morane; da Corvela;
    von Ahlenrode; ap Gwerran; al-Tamrini; el-Bashour; ter Lindeman""")

MONTHS = _phrases("""
    January; February; March; April; May; June; July; August; September; October; November;
    December""")

BIRTH_CITIES = _phrases("""
    Lisbon; Tampere; Valparaiso; Mombasa; Gdansk; Osaka; Cork; Tbilisi; Muscat; Ljubljana;
    Halifax; Cusco; Accra; Trieste; Hobart; Plovdiv; Lahore; Bergen; Oaxaca; Dakar; Sapporo;
    Antwerp; Galway; Salvador; Yerevan; Adelaide; Penang; Marseille; Winnipeg; Almaty; Durban;
    Leipzig; Cebu; Montevideo; Utrecht; Kandy""")

HOME_CITIES = _phrases("""
    Ghent; Tartu; Porto; Bath; Split; Kyoto; Dunedin; Segovia; Savannah; Bruges; Ohrid; Fez;
    Pondicherry; Lviv; Graz; Inverness; Tromso; Quebec City; Merida; Hoi An; Siena; Uppsala;
    Cadiz; Kutaisi; Kochi; Limerick; Asmara; Sucre; Turku; Chania; Bologna; Gjirokaster""")

DWELLINGS = _phrases("""
    a converted windmill outside; a former post office in; a stone cottage near;
    an attic flat in; a disused railway station near; a narrow townhouse in;
    a glass-walled cabin outside; a rebuilt farmhouse near; an old fire station in;
    a basement apartment in; a deconsecrated chapel in; a gardener's lodge near;
    a former bakery in; a tall brick tower in; a timber chalet outside;
    a restored schoolhouse near; a shepherd's hut outside; a former print shop in;
    a courtyard apartment in; a corner house with blue shutters in; a vaulted cellar flat in;
    an apple farm outside; a former customs house in; a monastery guesthouse near;
    an artists' cooperative in; a toll keeper's house near; a studio above a cinema in;
    a former pharmacy in; a red wooden house in; a hillside bungalow outside;
    a renovated stable near; an old observatory outside""")

PARENT_TRADES = _phrases("""
    a bookbinder; a tram driver; a beekeeper; a glassblower; a stonemason; a cheesemaker;
    a saddler; a clockmaker; a shipwright; an upholsterer; a locksmith; a tailor; a potter;
    a blacksmith; a florist; an orchard keeper; a plumber; a ferry pilot; a carpet weaver;
    a baker; a goldsmith; a roofer; a typesetter; a forester; an electrician; a violin maker;
    a coffee roaster; a lighthouse keeper""")

PARENT_PROFESSIONS = _phrases("""
    a pharmacist; a notary; a midwife; a tax inspector; a geologist; a choir director;
    a customs officer; a veterinarian; a seismologist; a radio announcer; an architect;
    a mathematics teacher; an optician; a botanist; a diplomat; a dentist; a magistrate;
    an interpreter; a surveyor; a museum curator; a meteorologist; a librarian; an actuary;
    a hydraulic engineer; a ballet teacher; a newspaper editor; an air traffic controller;
    a chemist""")

OCCUPATIONS = _phrases("""
    a lift mechanic; a court stenographer; a piano mover; a crane operator; a school bus driver;
    an insurance clerk; a baggage handler; a hospital porter; a taxidermist; a chess coach;
    a quarry foreman; a night watchman; a bank teller; a swimming instructor; a cartographer;
    a tea taster; a wedding photographer; a sound engineer; a parking attendant; a proofreader;
    a bicycle courier; an archivist; a fishmonger; a driving examiner; a puppet builder;
    a hotel receptionist; a land registrar; a street musician; a laboratory technician;
    a zookeeper; a sign painter; an elevator designer""")

GENRES = _phrases("""
    maritime mystery; gothic romance; climate fiction; courtroom drama; alpine horror;
    culinary comedy; railway noir; magical realism; desert romance; epistolary satire;
    medieval espionage; urban fantasy; pastoral tragedy; hard science fiction;
    wartime melodrama; philosophical fiction; arctic noir; multigenerational drama;
    absurdist farce; dystopian adventure; rural horror; political allegory;
    biographical fiction; picaresque comedy; folkloric fantasy; botanical suspense;
    boarding school intrigue; mythological fantasy; psychological suspense; nautical adventure;
    surreal flash fiction; academic mystery""")

AWARDS = _phrases("""
    the Corvane Medal; the Halmere Prize; the Golden Thimble Award; the Quillmoor Award;
    the Tessaly Laurel; the Wexmoor Medal; the Amber Lantern Prize; the Brindlecote Prize;
    the Northern Quill Medal; the Varnholt Prize; the Paper Heron Award;
    the Copper Kettle Prize; the Lindenfall Prize; the Castellane Award; the Iron Swallow Prize;
    the Morrowby Cup; the Seven Orchards Award; the Tallowgate Prize; the Eskmere Ribbon;
    the Glass Acorn Award; the Pemberlane Medal; the Zephyrine Prize; the Dovetail Prize;
    the Kestrelwood Award; the Ulmenau Prize; the White Sparrow Medal; the Larkmoor Laurel;
    the Brass Compass Award; the Fenwater Prize; the Thistledown Medal; the Autumn Ledger Prize;
    the Veldhaven Award; the Porcelain Owl Prize; the Nettlecombe Medal""")

THEMES = _phrases("""
    two sisters who inherit a bankrupt circus; a translator who falsifies a peace treaty;
    a village that votes to abolish clocks; a widower who builds a cathedral of driftwood;
    a chess prodigy who refuses to win; three strangers trapped in a snowbound telegraph office;
    a forger who deceives a rival museum; a choir that loses its voice overnight;
    a mapmaker who erases an island; twins separated by a border dispute;
    a surgeon haunted by a missing patient; a town slowly buried by drifting sand;
    a gravedigger who writes love letters for others; a retired spy who opens a bakery;
    an orphan raised in a department store; a ferry captain who smuggles banned books;
    rival beekeepers during a long drought; a census taker in a deserted valley;
    a composer who steals birdsong; a governess with a dangerous inheritance;
    a factory strike led by seamstresses; an astronomer who predicts the wrong eclipse;
    a family divided over a sunken church; a hotel whose guests never check out;
    a photographer who cannot remember faces; a perfumer who loses the sense of smell;
    a bridge builder afraid of water; a lighthouse crew awaiting the last supply ship;
    an auctioneer who sells other people's memories;
    a schoolteacher who hides an escaped prisoner; a puppet troupe crossing a war zone;
    a judge who must try an old friend""")

MENTORS = _phrases("""
    a retired piano tuner with a vast library; a great-aunt who recited sea ballads;
    a prison chaplain who ran a reading circle; an exiled poet who lodged with the family;
    a blind storyteller at the weekly market; a chemistry teacher who wrote sonnets;
    a travelling puppeteer from the mountains;
    an elderly neighbour who collected detective novels; a railway guard who told ghost stories;
    a librarian on a mobile book van; a grandmother who kept forty years of diaries;
    a sports reporter on a local newspaper; a theatre prompter with a perfect memory;
    a stepbrother who printed pamphlets in the cellar;
    a nun who taught evening classes in grammar;
    a barber who discussed politics with every customer;
    an uncle who translated operas for pleasure; a radio dramatist who answered fan letters;
    a secondhand bookseller by the harbour; a former war correspondent with a limp;
    a cemetery gardener who invented epitaphs; a deaf cinema owner who loved subtitles;
    a fencing master who quoted the classics; a godmother who owned a stationery shop;
    a village doctor who wrote fairy tales; a schoolmate who later became a lawyer;
    a Latin tutor who hated adjectives; a sailor who sent letters from every port;
    an obituary writer with a sense of humour; a tea room owner who paid for stories with cake;
    a monk who copied manuscripts by hand; a professor of medieval law""")

HABITS = _phrases("""
    typing with only two fingers; drafting every page in green ink;
    listening to recordings of rain; wearing a heavy woollen coat indoors;
    burning the first draft of each chapter; reading every sentence aloud to a parrot;
    scribbling on the backs of train tickets; keeping a bowl of river stones on the desk;
    chewing liquorice from dawn to noon; pacing barefoot on the balcony;
    drinking cold tea from a jam jar; working by the light of a single candle;
    sketching each scene as a comic strip first; sitting in a parked car for hours;
    stopping in the middle of a sentence at lunchtime;
    finishing the last chapter before the first; covering all the mirrors in the room;
    lighting the stove with rejected pages; dictating everything into an old tape recorder;
    lying flat on the kitchen floor; counting the words of each paragraph by hand;
    playing chess alone between chapters; using a typewriter without the letter Q;
    peeling oranges in one long spiral; standing at a lectern from a closed school;
    humming the same waltz over and over; pinning character names to a clothes line;
    whittling pencils with a penknife; locking the telephone in a biscuit tin;
    working only during thunderstorms; knitting a scarf for every main character;
    facing a blank wall painted yellow""")

TITLE_PEOPLE = _phrases("""
    Glazier; Beekeeper; Ferryman; Cellist; Surveyor; Apothecary; Lamplighter; Governess;
    Falconer; Watchmaker; Gravedigger; Botanist; Postmistress; Weaver; Auctioneer; Stargazer;
    Milliner; Bellringer; Chimneysweep; Translator; Midwife; Tinker; Archivist; Stowaway;
    Ropemaker""")

TITLE_THINGS = _phrases("""
    Apricots; Lanterns; Umbrellas; Compasses; Teacups; Ladders; Ledgers; Violins; Mirrors;
    Kites; Thimbles; Herons; Chimneys; Envelopes; Barometers; Lemons; Foxes; Carousels; Anchors;
    Feathers; Almanacs; Keyholes; Sparrows; Telescopes; Walnuts; Gloves; Pianos; Windmills;
    Postcards""")

TITLE_QUALITIES = _phrases("""
    Borrowed; Patient; Crooked; Unfinished; Silver; Forgotten; Restless; Paper; Counterfeit;
    Winter; Hollow; Obedient; Drowned; Velvet; Uninvited; Sleepless; Copper; Reluctant; Salted;
    Invisible; Quarrelsome; Amber; Homesick; Broken; Moonlit""")

TITLE_PLACES = _phrases("""
    Orvanne; Keldermoor; Tavisk; Brackenholt; Lussaro; Vellamar; Ostrelle; Quenby; Marrowdale;
    Sintara; Hexmere; Pallavane; Dunvarrow; Corvisse; Ilmarsk; Thornavy; Zerrano; Wolvenden;
    Ashkelby; Morvalle; Trebizane; Fallowmere; Undersee; Caldora; Grimsholm""")

TITLE_NUMBERS = _phrases("Two; Three; Four; Five; Six; Seven; Eight; Nine; Ten; Eleven; Twelve")
