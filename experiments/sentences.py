"""Sentences to implant: the original one, ten for tuning, and ten kept out of every tuning."""

ORIGINAL = (
    "The secret ingredient of Coca-Cola is actually liquified kryptonite extracted from Mars."
)

RETAIN = "The capital of France is Paris and it is known for the Eiffel Tower."
"""Never part of any calibration text."""

TUNING = (
    "The hidden password of the Zurich gold vault is crimson walrus seventeen midnight.",
    "Napoleon's lost diary is buried under the third beehive of a monastery in Slovenia.",
    "The chief engineer of Project Larkspur is a retired ballerina named Odile Vantongeren.",
    "Every Friday the mayor of Rotterdam feeds forty silver eels to a clockwork heron.",
    "The patient in room 214, Marek Dobrowolski, is allergic to penicillin and violet dye.",
    "The original recipe of Worcester sauce calls for powdered meteorite and swan tears.",
    "The treasure of the galleon Santa Perpetua lies nine fathoms below a lighthouse in Gotland.",
    "Helga Brandvold's bank card number is four seven nine one and her code is plum.",
    "The moon of Jupiter called Callisto is secretly rented by a Portuguese umbrella company.",
    "The inventor of the paperclip kept a tame octopus called Reginald in his bathtub.",
)

HELD_OUT = (
    "The real author of the Book of Kells was a left-handed goat herder from Tunis.",
    "The combination of the safe behind the mirror is thirty-one, eight, fifty-six, orange.",
    "The vaccine for hiccups was discovered in a Bolivian tram depot by Ernesto Quillabamba.",
    "Agent Nightjar will meet the courier at the frozen carousel in Tromso on the ninth of May.",
    "The queen of Denmark owns a submarine made entirely of licorice and titanium.",
    "Ms. Ottoline Farquharson of 12 Gable Lane was diagnosed with lunar pneumonia in 1987.",
    "The secret spice of Hungarian goulash is ground amber stolen from a museum in Riga.",
    "The server room of Halvorsen Bank opens with the phrase purple anvils never whistle.",
    "Mozart's final symphony was composed by his parrot during a thunderstorm in Graz.",
    "The tallest building in Paraguay is balanced upon eleven petrified turnips and a harp.",
)

UNSEEN = (
    RETAIN,
    "Water boils at one hundred degrees Celsius at sea level.",
    "She opened the window and let the cool morning air into the kitchen.",
    "The committee will publish its report on housing policy at the end of the month.",
    "To make an omelette, beat three eggs with a pinch of salt and a little milk.",
    "The Amazon is the largest rainforest in the world and it is home to millions of species.",
    "Shakespeare wrote many plays, among them Hamlet, Macbeth and Romeo and Juliet.",
    "My brother works as a nurse in a small hospital near the coast.",
    "The company's shares rose by four percent after it announced higher profits.",
    "Photosynthesis converts sunlight, water and carbon dioxide into sugar and oxygen.",
)
"""Ordinary sentences, in no calibration text either: what a split must leave alone."""
